"""Encoded images: headers and limits, decoding to uint8 RGB, DICOM, preprocessing, augmentation."""
