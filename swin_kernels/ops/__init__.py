"""One file an operator: contract, validation, schema, fake function, autograd, autocast."""
