"""Models by name: diffusers folders, single files, hub ids, random weights; what each is, and how it is loaded."""
