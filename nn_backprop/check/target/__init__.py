"""What is checked: a module, a Function, a pair of NumPy functions, a callable."""
