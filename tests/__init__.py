"""The tests of condaccept."""
