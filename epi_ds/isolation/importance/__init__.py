"""How important every entry is: codes, storage, views, what finished stages left."""
