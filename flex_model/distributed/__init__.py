"""How an activation is made whole and cut again: meshes, routing, agreement between ranks."""
