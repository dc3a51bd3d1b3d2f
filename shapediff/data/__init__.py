"""Shapes on disk and in batches: shards, preparation and import, dataset, order of samples, augmentation."""
