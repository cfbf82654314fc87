"""The parts of ``epmoe scan``: files, names, definitions, sites, the rewrite. Standard library only."""
