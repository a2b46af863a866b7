"""What training did to the weights, from the files of finished runs alone."""
