"""What tests are about: layers, codes, models, files and servers, made for one contract each and shared by its tests."""
