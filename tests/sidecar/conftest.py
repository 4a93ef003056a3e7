from tests.support.sidecar_world import affine, fill_store, world

__all__ = ["affine", "fill_store", "world"]
