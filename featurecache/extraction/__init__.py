"""featurecache.extraction"""
