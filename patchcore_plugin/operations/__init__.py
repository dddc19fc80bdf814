"""What an operator does with a bundle: update, validate, measure."""
