"""The compiled modules. engine.ops.backends alone imports them; everyone else calls engine.ops."""
