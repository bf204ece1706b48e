"""Models to serve: `examples` is a ready repository, `training` made it, `zoo` fetches and converts pretrained ones."""
