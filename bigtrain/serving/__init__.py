"""The detector in use: score folders of pictures, calibrate, export, serve, push. What `bigtrain …` runs."""
