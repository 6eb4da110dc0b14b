"""``gradproj serve``: the server behind the page and the JSON API."""
