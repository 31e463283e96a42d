"""A smaller model out of a larger one: what each part of it does, which parts stay, and the model that is left."""
