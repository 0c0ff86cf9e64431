"""Cases whose answer is known in closed form."""
