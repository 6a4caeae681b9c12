"""The schema: frozen pydantic sections; the text under a field is its documentation."""
