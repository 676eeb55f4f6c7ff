"""A trained model at work: pictures, state and instruction in, actions in data units out."""
