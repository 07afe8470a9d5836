"""Pages and pictures: the report of runs, its figures, the gallery, the plots of a run folder."""
