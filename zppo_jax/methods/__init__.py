"""Training methods: each says which sequences, what each token is worth, and which terms read
it."""
