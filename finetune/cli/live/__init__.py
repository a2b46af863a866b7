"""The part of the screen that follows a run: figures, their drawing, and the place that they keep below everything else."""
