"""What is expected: autograd through the plain forward, forward mode, differences."""
