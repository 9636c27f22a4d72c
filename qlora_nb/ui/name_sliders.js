// For screen readers: ipywidgets names no slider, and of a choice it tells the place in the list and not the choice itself.
document.querySelectorAll('.widget-slider').forEach(slider => {
    const [label, handle, readout] = ['label', '[role=slider]', '.widget-readout'].map(part => slider.querySelector(part));
    if (label && handle && readout) {
        handle.ariaLabel = readout.ariaLabel = label.textContent;
        handle.ariaValueText = readout.textContent;
        readout.role = 'textbox';
    }
});
