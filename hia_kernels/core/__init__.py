"""Parts that every op shares: argument checks, backend choice, packing and autocast. Imports only torch."""
