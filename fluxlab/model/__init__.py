"""What FLUX is: modules and functions, tensors in, tensors out."""
