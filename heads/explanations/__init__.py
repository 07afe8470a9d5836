"""Why a head said what it said: contributions, attention, Grad-CAM, drawn over the images."""
