"""Guest images and the layers that agents add to them: built once, named by digest, never changed."""
