"""heads.studies"""
