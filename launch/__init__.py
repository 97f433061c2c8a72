"""Starting ranks: every launcher only produces the six variables of one contract."""
