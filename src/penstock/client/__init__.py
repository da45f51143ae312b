"""What a device or gateway runs. Imports only the standard library and msgspec."""
