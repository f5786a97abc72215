"""Training of binary networks: losses against a teacher."""
