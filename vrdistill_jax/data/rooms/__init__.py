"""The parts of SynthRooms: furniture from meshes, its placement in a room, and the cameras that look at it."""
