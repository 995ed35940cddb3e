"""Parts of the settings table that `config` puts together: what a setting is, the door's, what values may be."""
