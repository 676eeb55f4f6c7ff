"""HDF5 as LIBERO, robomimic (MimicGen, RoboCasa) and ALOHA write it: layouts as data, one reader."""
