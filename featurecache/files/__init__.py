"""featurecache.files"""
