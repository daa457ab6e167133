"""How well predicted label maps agree with labels: scores of cases, their statistics, pictures."""
