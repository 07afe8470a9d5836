"""featurecache.commands"""
