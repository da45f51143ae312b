"""Bytes of a request → event lines → frames. Pure: bytes and values in, values out."""
