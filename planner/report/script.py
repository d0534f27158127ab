"""The little script of the HTML report. Without it everything is there to read; with it drawings answer a pointer at
once and timelines can be zoomed (buttons, or the wheel with Ctrl) and dragged."""

SCRIPT = """
(function () {
  var tip = document.createElement('div');
  tip.className = 'tip';
  tip.setAttribute('role', 'status');
  document.body.appendChild(tip);
  function text(target) {
    var title = target.querySelector && target.querySelector(':scope > title');
    return title ? title.textContent : '';
  }
  document.addEventListener('pointermove', function (event) {
    var found = event.target.closest && event.target.closest('svg rect') ? text(event.target) : '';
    tip.style.display = found ? 'block' : 'none';
    if (!found) return;
    tip.textContent = found;
    var right = event.clientX + 14 + tip.offsetWidth > document.documentElement.clientWidth;
    tip.style.left = (right ? event.clientX - tip.offsetWidth - 10 : event.clientX + 14) + 'px';
    tip.style.top = (event.clientY + 16) + 'px';
  });
  document.addEventListener('pointerleave', function () { tip.style.display = 'none'; });

  document.querySelectorAll('svg.timeline').forEach(function (svg) {
    var left = +svg.dataset.left, width = svg.viewBox.baseVal.width, zoom = 1, at = left;
    var shapes = Array.from(svg.querySelectorAll('rect:not(.idle), text.on')).filter(function (shape) {
      return +shape.getAttribute('x') >= left - 1;
    }).map(function (shape) {
      return [shape, +shape.getAttribute('x'), +(shape.getAttribute('width') || 0)];
    });
    var ends = svg.querySelectorAll('text.small:not([x="0"])');
    var clip = document.createElementNS(svg.namespaceURI, 'clipPath');
    clip.id = 'plot' + Math.random().toString(36).slice(2);
    clip.innerHTML = '<rect x="' + left + '" y="0" width="' + (width - left) + '" height="9999"/>';
    svg.appendChild(clip);
    shapes.forEach(function (shape) { shape[0].setAttribute('clip-path', 'url(#' + clip.id + ')'); });
    function draw() {
      at = Math.max(left, Math.min(at, width - (width - left) / zoom));
      shapes.forEach(function (shape) {
        shape[0].setAttribute('x', left + (shape[1] - at) * zoom);
        if (shape[2]) shape[0].setAttribute('width', shape[2] * zoom);
      });
      ends.forEach(function (label) { label.style.visibility = zoom > 1 ? 'hidden' : 'visible'; });
      svg.dataset.zoom = zoom;
    }
    function change(factor, where) {
      var before = at + (where - left) / zoom;
      zoom = Math.max(1, Math.min(400, zoom * factor));
      at = before - (where - left) / zoom;
      draw();
    }
    function place(event) {
      var box = svg.getBoundingClientRect();
      return Math.max(left, (event.clientX - box.left) / box.width * width);
    }
    svg.addEventListener('wheel', function (event) {
      if (!event.ctrlKey && !event.metaKey) return;
      event.preventDefault();
      change(event.deltaY < 0 ? 1.3 : 1 / 1.3, place(event));
    }, { passive: false });
    var held = null;
    svg.addEventListener('pointerdown', function (event) { if (zoom > 1) held = place(event); });
    svg.addEventListener('pointermove', function (event) {
      if (held === null) return;
      var now = place(event);
      at -= (now - held) / zoom;
      held = now;
      draw();
    });
    ['pointerup', 'pointerleave'].forEach(function (name) {
      svg.addEventListener(name, function () { held = null; });
    });
    var bar = document.createElement('div');
    bar.className = 'zoom';
    [['+', 2, 'zoom in'], ['-', 0.5, 'zoom out'], ['all', 0, 'show all']].forEach(function (item) {
      var button = document.createElement('button');
      button.textContent = item[0];
      button.setAttribute('aria-label', item[2]);
      button.addEventListener('click', function () {
        if (item[1]) change(item[1], left + (width - left) / 2); else { zoom = 1; at = left; draw(); }
      });
      bar.appendChild(button);
    });
    svg.parentNode.parentNode.insertBefore(bar, svg.parentNode);
  });
})();
"""
