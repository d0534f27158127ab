"""A zoo of architectures, each planned, rewritten and compared with one device; `tests.zoo.registry` lists them."""
