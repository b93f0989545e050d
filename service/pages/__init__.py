"""Tables and pictures of the documents, for people. Nothing is printed here."""
