"""featurecache.store"""
