"""Teachers: the contract a plugin fills (family, protocol), the registry that finds it, the view objectives use."""
