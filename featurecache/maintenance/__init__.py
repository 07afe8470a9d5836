"""featurecache.maintenance"""
