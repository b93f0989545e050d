"""What people look at in a browser: figures of documents, reports as one file, and the service's page."""
