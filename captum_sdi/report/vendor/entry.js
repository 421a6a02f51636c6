export { h, render, Fragment } from "preact";
export { useState, useEffect, useLayoutEffect, useMemo, useRef, useCallback } from "preact/hooks";
import { h } from "preact";
import htm from "htm";
export const html = htm.bind(h);
