"""What is not the paper: the machine, files, images, pictures, and the folder of a run."""
