"""How well predicted label maps agree with the labels: scores of cases, statistics over them, pictures."""
