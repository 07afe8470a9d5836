"""featurecache.images"""
