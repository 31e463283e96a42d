"""forerun inside other people's programs. Each module needs what it integrates with, and nothing else needs it."""
