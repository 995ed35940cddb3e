"""Pure checks of what clients ask for, before anything of it is stored."""
